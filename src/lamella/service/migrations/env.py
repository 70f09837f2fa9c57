"""What alembic runs: the steps over the connection that the caller gives it."""

from __future__ import annotations

from alembic import context

from lamella.service.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
