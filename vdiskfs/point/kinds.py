"""What a page of a point may be. Nothing else."""

# Never written, or cut away; zeros; data. The first two read alike.
ABSENT, ZERO, FULL = 0, 1, 2
