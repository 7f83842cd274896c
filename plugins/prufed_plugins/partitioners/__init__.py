"""How one data set is split over clients. One method, one file."""
