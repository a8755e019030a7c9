"""What a request asks for and what is answered, whatever the transport."""
