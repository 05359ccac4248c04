"""`lora bench`: this machine's CPU measured against PEFT and what else is there, after the outputs agree."""
