"""The steps from each schema of the store to the next, for alembic; `lamella.service.database.migrate` runs them."""
