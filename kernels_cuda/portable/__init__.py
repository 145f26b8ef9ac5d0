"""Triton sources shared by both GPU vendors; vendor facts come in as constexpr arguments."""
