"""What a GPU makes of this code, in at most eight minutes: `make gpu-check`."""
