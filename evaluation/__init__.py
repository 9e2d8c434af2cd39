"""Numbers in, numbers and pictures out: metrics, protocols, statistics, figures and reports."""
