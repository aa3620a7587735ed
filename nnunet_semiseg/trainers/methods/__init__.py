"""One file for each method; the registry finds every trainer in this folder by itself."""
