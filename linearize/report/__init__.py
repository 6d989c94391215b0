"""The results of an evaluation as one structure, and its renderers: JSON, Markdown, HTML, plots, model card."""
