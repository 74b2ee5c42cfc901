use crate::cli::Ending;
use crate::cli::args::ImageArgs;
use crate::cli::sheet::{Address, Sheet};
use crate::error::{Attempt, Result};
use crate::host::Tool;
use crate::image;
use crate::location::{Location, Server};
use crate::luks::Header;
use crate::remote::Access;
use crate::session;
use crate::ui::say;

/// Print how to get at the files without this program
///
/// The exact commands with stock ssh, sshfs, cryptsetup and mount, for this image. Print it, and keep
/// it with the passphrase where neither burns together with the computer; it holds no secret but
/// the address. Needs no key.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// As a page to print, with a QR code of what matters most
    #[arg(long)]
    html: bool,
}

pub fn run(args: Args) -> Result<Ending> {
    let location = args.image.location()?;
    session::end_at_signals()?;
    let look = || -> Result<_> {
        let store = image::connect(&location, &args.image.link()?)?;
        let sealed = image::inspect(&*store, Access::ReadOnly)?;
        let header: &Header = sealed.header();
        Ok(Sheet {
            location: location.to_string(),
            address: address(&args, &location)?,
            size: sealed.size(),
            uuid: header.uuid().into(),
            label: header.label().into(),
            cipher: header.segment().encryption().into(),
            keyslots: header.keyslots().len(),
            printed: jiff::Zoned::now().strftime("%Y-%m-%d").to_string(),
        })
    };
    let sheet = look().attempt(|| format!("cannot write a recovery sheet for {location}"))?;
    match args.html {
        true => say!("{}", sheet.html()?),
        false => say!("{}", sheet.text().trim_end()),
    }
    Ok(Ending::Clean)
}

fn address(args: &Args, location: &Location) -> Result<Address> {
    Ok(match location {
        Location::Local(path) => {
            let path = std::path::absolute(path).attempt(|| "find the current directory")?;
            Address {
                server: None,
                path: path.to_string_lossy().into_owned(),
            }
        }
        Location::Sftp(server, path) => Address {
            server: Some(resolved(args, server)),
            path: path.as_str().into(),
        },
    })
}

/// What ssh makes of the server's name here: another machine does not have this one's
/// configuration. Without an ssh program it stays as it is.
fn resolved(args: &Args, server: &Server) -> Server {
    let link = &args.image.link;
    let mut tool = Tool::new("ssh").arg("-G");
    if let Some(file) = &link.ssh_config {
        tool = tool.arg("-F").arg(file);
    }
    for option in &link.ssh_option {
        tool = tool.args(["-o", option]);
    }
    let name = match &server.user {
        Some(user) => format!("{user}@{}", server.host),
        None => server.host.clone(),
    };
    let port = server.port.or(link.ssh_port);
    let told = match tool.args(["--", &name]).run() {
        Ok(output) => output.text(),
        Err(error) => {
            tracing::debug!(%error, "the host is not looked up in the configuration of ssh");
            String::new()
        }
    };
    let word = |keyword: &str| {
        let line = told.lines().find_map(|line| line.strip_prefix(keyword))?;
        Some(line.trim().to_string()).filter(|word| !word.is_empty())
    };
    Server {
        user: word("user ").or(server.user.clone()),
        host: word("hostname ").unwrap_or(server.host.clone()),
        port: port.or_else(|| word("port ")?.parse().ok().filter(|port| *port != 22)),
    }
}
