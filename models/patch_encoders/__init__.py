"""The frozen patch encoders: a table of what each needs, their weights, their construction."""
