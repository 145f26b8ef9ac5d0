"""One parametric decoder, the families that describe models to it, and the loading of weights."""
