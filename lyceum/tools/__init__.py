"""What the model may call: functions from a call's arguments to a text, with the schemas that the model reads."""
