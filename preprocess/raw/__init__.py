"""Downloads as they come: Space Ranger, HEST-1k, GEO; found, read, placed."""
