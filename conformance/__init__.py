"""The kit by which a vendor proves a platform: levels L0 to L5, installed with the package."""
