"""Entry points: the `nexus` command and the scripts that `ray job submit` runs."""
