"""What --mode doctor looks at."""
