"""Facts about base architectures, as data. README.md says how to add a family and what each fact means."""
