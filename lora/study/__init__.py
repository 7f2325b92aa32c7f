"""The study: what the book's experiments need, and a reader's own project does not."""
