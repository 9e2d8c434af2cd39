"""What is tried for hours rather than seconds: damaged files, kills, full disks, two processes at once. `make soak`."""
