"""Which method to trust: measuring, tables and charts."""
