"""Text and rows: documents, packing, recall rows, and the samples that ship with the package."""
