"""`trimaran plan`: what a model needs and how fast it can be, said before anything is loaded."""
