"""Loss terms, one file each: what a student is asked to do about a batch."""
