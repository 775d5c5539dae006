"""What a model perceives beside pictures: sounds, their frozen encoders and what connects them."""
