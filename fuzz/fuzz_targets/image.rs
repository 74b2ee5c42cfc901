#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| e2ebak_fuzz::run("image", data));
