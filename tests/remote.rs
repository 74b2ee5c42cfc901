//! Images in local files and behind SFTP: one suite of behaviours that every store must pass, and
//! what is particular to a link.

#[path = "remote/built_in_ssh.rs"]
mod built_in_ssh;
#[path = "remote/fake.rs"]
mod fake;
#[path = "remote/lease.rs"]
mod lease;
#[path = "remote/limit.rs"]
mod limit;
#[path = "remote/link.rs"]
mod link;
#[path = "remote/model_server.rs"]
mod model_server;
#[path = "remote/redial.rs"]
mod redial;
#[path = "remote/resend.rs"]
mod resend;
#[path = "remote/rig.rs"]
mod rig;
#[path = "remote/shared.rs"]
mod shared;
#[path = "remote/suite.rs"]
mod suite;

/// Runs every behaviour in every place.
macro_rules! everywhere {
    ([$($rig:ident)*] $behaviours:tt) => {
        $(mod $rig { everywhere!(@in $rig $behaviours); })*
    };
    (@in $rig:ident { $($suite:ident { $($behaviour:ident)* })* }) => {
        $(mod $suite {
            $(#[test]
            fn $behaviour() {
                if let Some(rig) = crate::rig::Rig::$rig() {
                    crate::$suite::$behaviour(&rig);
                }
            })*
        })*
    };
}

everywhere! {
    [local pipes plain sshd built_in]
    {
        suite {
            a_new_image_is_sparse_and_reads_as_zeros
            what_is_written_is_read_whatever_its_size_and_place
            many_threads_at_once_stay_apart
            nothing_is_created_over_what_exists
            no_image_is_said_so
            a_directory_is_no_image
            resizing_grows_by_holes_and_cuts_the_tail
            beyond_the_end_is_an_error_before_anything_is_done
            a_file_cut_off_behind_our_back_is_an_error_not_zeros
            opened_for_reading_nothing_can_be_changed
            discard_gives_zeros_or_changes_nothing
            an_image_outlives_its_session
            a_removed_image_is_gone
            side_files_are_made_read_replaced_and_removed
            side_files_have_a_largest_size
            of_many_creators_of_a_side_file_one_wins
            a_missing_directory_is_named
            room_is_told_where_it_can_be
            traffic_is_counted
        }
        lease {
            one_takes_it_and_the_other_hears_who
            a_dead_holder_is_succeeded
            of_many_takers_one_wins
            holders_never_overlap
            a_foreign_lease_needs_force
            a_lease_taken_away_is_noticed_and_not_removed
            an_unreadable_lease_needs_force
        }
    }
}
