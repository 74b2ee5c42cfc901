//! LUKS2 both ways against the real cryptsetup, then against damage.

#[path = "luks/broken.rs"]
mod broken;
#[path = "luks/cryptsetup.rs"]
mod cryptsetup;
#[path = "luks/damage.rs"]
mod damage;
#[path = "luks/made_by_cryptsetup.rs"]
mod made_by_cryptsetup;
#[path = "luks/made_by_us.rs"]
mod made_by_us;
#[path = "luks/sample.rs"]
mod sample;
