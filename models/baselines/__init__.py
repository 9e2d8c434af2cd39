"""What Gene-DML is compared with, behind the same contract."""
