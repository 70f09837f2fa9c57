"""What alembic runs: the steps over the connection that the caller gives it."""

from __future__ import annotations

from alembic import context

from lamella.service.schema import metadata


def run() -> None:
    """Take the steps."""
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


if hasattr(context, "config"):  # else it is only imported
    run()
