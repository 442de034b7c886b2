"""Every figure that README.md and docs/ quote, each by one command."""
