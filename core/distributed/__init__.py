"""Groups of processes that one model is split over."""
