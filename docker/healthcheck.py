"""Exits 0 if the server in this container is ready, that is if GET /ready says 200; 1 otherwise, with the reason.

Reads PORT. http.client, because urllib would ask a proxy that the environment names.
"""

import http.client
import os
import sys

TIMEOUT_S = 4

try:
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ["PORT"]), timeout=TIMEOUT_S)
    connection.request("GET", "/ready")
    response = connection.getresponse()
    print(response.status, response.read(500).decode("utf-8", "replace"))
    sys.exit(response.status != 200)
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"/ready cannot be read: {error}")
