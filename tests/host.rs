#[test]
fn count() {
    println!(
        "THREADS {}",
        std::fs::read_dir("/proc/self/task").unwrap().count()
    );
}
