"""Between values and protobuf: requests, answers, errors, names."""
