"""slipstream: makes trained models fast and puts them into production safely."""
