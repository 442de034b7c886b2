"""The sampling task and the engine that steps every request together."""
