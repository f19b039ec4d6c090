"""Ways to run a model: image stream, live session, batch job."""
