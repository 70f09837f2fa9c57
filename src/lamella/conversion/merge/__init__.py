"""Method "merge": several models of one shape become the experts of one."""
