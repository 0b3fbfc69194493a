"""Sample data and sample teachers of the quickstart, with the scripts that make them (see README.md)."""
