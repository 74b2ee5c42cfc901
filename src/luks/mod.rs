//! luks
