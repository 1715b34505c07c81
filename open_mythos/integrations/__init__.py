"""Models and libraries from elsewhere. Each module needs an extra, which its errors name."""
