"""The runtime around a Device: a camera's newest frame in, answers out to a file, MQTT or Home Assistant."""
