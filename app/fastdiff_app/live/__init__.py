"""The page and its transport: one process that serves Gradio, a binary WebSocket, health and metrics."""
