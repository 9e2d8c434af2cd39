"""A training on several processes: each batch shared out, or each fold."""
