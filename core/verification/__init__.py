"""Two platforms on the same model: do they give the same tokens, and where do layers part?"""
