"""What each training method means in terms of the libraries that carry it out."""
