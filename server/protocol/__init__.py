"""What clients may send: pydantic models in which every number, string and list has its bounds."""
