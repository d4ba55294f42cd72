"""A run's configuration: schema, loading, error messages and resume policy."""
