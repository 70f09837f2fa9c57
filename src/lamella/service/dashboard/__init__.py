"""The dashboard: pages that read the same API as everyone else. No build step, nothing from another server."""
