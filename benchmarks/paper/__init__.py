"""The paper's comparisons at a scale that two CPU cores can train; see PROTOCOL.md."""
