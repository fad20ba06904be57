"""What several measurements share: options, reports, servers and streams, texts, shapes, the machine."""
