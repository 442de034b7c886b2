"""What pictures are worth by sampling, and whether plans choose the right one."""
